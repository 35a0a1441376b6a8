#!/usr/bin/env bash
# Known vulnerabilities of all that constraints.txt pins, by pip-audit.
#
#   benchmarks/audit.sh PIP_AUDIT
#
# Exits with 0 if there are none, 1 if there are (printed by package), 2 if nothing could be checked.
set -euo pipefail
cd "$(dirname "$0")/.."
report=$(mktemp)
trap 'rm -f "$report"' EXIT
code=0
"$1" --requirement constraints.txt --no-deps --disable-pip --progress-spinner off --timeout 15 \
    --format json --output "$report" || code=$?
if [ ! -s "$report" ]; then
    echo "audit: the service of known vulnerabilities could not be asked (above is why): nothing was checked" >&2
    exit 2
fi
python3 - "$report" <<'PY'
import json
import sys

with open(sys.argv[1], encoding="utf-8") as file:
    packages = json.load(file)["dependencies"]
skipped = [package for package in packages if "skip_reason" in package]
found = [(package, vulnerability) for package in packages for vulnerability in package.get("vulns", [])]
for package in skipped:
    print(f"audit: {package['name']} was not checked: {package['skip_reason']}")
for package, vulnerability in found:
    mended = ", ".join(vulnerability["fix_versions"]) or "no release yet"
    print(f"audit: {package['name']} {package['version']}: {vulnerability['id']}, mended in {mended}")
print(f"audit: {len(found)} known vulnerabilities in {len(packages) - len(skipped)} packages")
sys.exit(1 if found else 2 if skipped else 0)
PY
exit $code
