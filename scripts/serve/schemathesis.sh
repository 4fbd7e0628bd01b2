#!/usr/bin/env bash
# Requests made from the server's own OpenAPI document: schemathesis.sh URL [further options]
set -euo pipefail
url=${1:?usage: schemathesis.sh URL}
shift
SCHEMATHESIS_HOOKS="$(dirname "$0")/schemathesis_hooks.py"
export SCHEMATHESIS_HOOKS
exec "${SCHEMATHESIS:-schemathesis}" --config-file "$(dirname "$0")/schemathesis.toml" run "$url/openapi.json" --max-examples 50 --request-timeout 300 "$@"
