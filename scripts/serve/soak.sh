#!/usr/bin/env bash
# Starts `tandem serve` with the bundled model, soaks it with soak.py and stops it: soak.sh RESULT [MINUTES]
# One thread computes, the other core is left to HTTP and the client. TANDEM names another binary, FLAGS other flags.
set -euo pipefail
cd "$(dirname "$0")/../.."
result=$1 minutes=${2:-10} tandem=${TANDEM:-target/release/tandem}
flags=${FLAGS:---threads 1 --inter-token-ms 1.5 --prefill-share 1}
said=$(mktemp)
# shellcheck disable=SC2086 # several flags
"$tandem" serve --port 0 --prefill-chunk 64 --context 2048 $flags 2>"$said" &
server=$!
trap 'kill $server 2>/dev/null || true; wait $server || true; rm -f "$said"' EXIT
until url=$(grep -o 'http://[^ ]*' "$said"); do
    kill -0 $server || { cat "$said"; exit 1; }
    sleep 0.1
done
{
    echo "$tandem serve --prefill-chunk 64 --context 2048 $flags; soak.py --minutes $minutes; $(nproc) processors"
    python3 scripts/serve/soak.py "$url" $server --minutes "$minutes"
} | tee "$result"
