#!/usr/bin/env bash
# Known vulnerabilities of all that the files of constraints/ pin, by pip-audit.
#
#   benchmarks/audit.sh PIP_AUDIT
#
# Exits with 0 if there are none, 1 if there are (a line for each), 2 if some or all packages could not be checked.
set -euo pipefail
cd "$(dirname "$0")/.."
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
# Its own last line says that nothing is known of packages that it could not ask about; so it is shown only where it failed.
for pins in constraints/*.txt; do
    report=$folder/$(basename "$pins").json
    "$1" --requirement "$pins" --no-deps --disable-pip --progress-spinner off --timeout 15 \
        --format json --output "$report" >"$folder/log" 2>&1 || true
    if [ ! -s "$report" ]; then
        cat "$folder/log" >&2
        echo "audit: the service of known vulnerabilities could not be asked (above is why): $pins was not checked" >&2
        exit 2
    fi
done
python3 - "$folder"/*.json <<'PY'
import json
import sys

reports = [json.load(open(path, encoding="utf-8"))["dependencies"] for path in sys.argv[1:]]
packages = list({json.dumps(package, sort_keys=True): package for report in reports for package in report}.values())
skipped = [package for package in packages if "skip_reason" in package]
found = [(package, vulnerability) for package in packages for vulnerability in package.get("vulns", [])]
for package, vulnerability in found:
    mended = ", ".join(vulnerability["fix_versions"]) or "no release yet"
    print(f"audit: {package['name']} {package['version']}: {vulnerability['id']}, mended in {mended}")
print(f"audit: {len(found)} known vulnerabilities in {len(packages) - len(skipped)} packages")
if skipped:
    names = ", ".join(package["name"] for package in skipped[:5]) + (", ..." if skipped[5:] else "")
    print(
        f"audit: {len(skipped)} of {len(packages)} packages were not checked ({names}): the service does not know them, or is "
        f"not reached ({skipped[0]['skip_reason']}); this is no success",
        file=sys.stderr,
    )
sys.exit(1 if found else 2 if skipped else 0)
PY
