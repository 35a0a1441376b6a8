#!/usr/bin/env bash
# The wheel and the source distribution of the commit that is checked out, in dist/. Both are built twice, in other folders
# and with files of other ages, and must come out the same byte for byte; the wheel is built from the source distribution.
#
#   benchmarks/dist.sh PYTHON     an interpreter with build and hatchling
set -euo pipefail
cd "$(dirname "$0")/.."
python=$(realpath -s "$1")
SOURCE_DATE_EPOCH=$(git log -1 --format=%ct)
export SOURCE_DATE_EPOCH
if [ -n "$(git status --porcelain)" ]; then echo "dist: what is not committed is left out" >&2; fi

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
for copy in first the_second; do
    mkdir "$folder/$copy"
    git archive HEAD | tar -x --touch -C "$folder/$copy"
    (cd "$folder/$copy" && "$python" -m build --no-isolation --outdir "$folder/$copy-dist" . >"$folder/log" 2>&1) || {
        cat "$folder/log" >&2
        exit 1
    }
done
diff -r "$folder/first-dist" "$folder/the_second-dist" || {
    echo "dist: two builds of one commit differ" >&2
    exit 1
}
mkdir -p dist
rm -f dist/*.whl dist/*.tar.gz
cp "$folder"/first-dist/* dist/
cd dist
ls -l -- *.whl *.tar.gz | awk '{print "dist/" $NF, $5, "bytes"}'
sha256sum -- *.whl *.tar.gz | tee SHA256SUMS
