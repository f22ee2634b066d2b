#!/usr/bin/env bash
# schemathesis on /openapi.json: drawn requests, right and wrong ones, to every route. An answer that is a 5xx, a status,
# a type or a body that the document does not have, or a wrong request that is taken, ends it with an error.
set -euo pipefail
base=${1:?give the address of a server}
PATH=$(dirname "$PYTHON"):$PATH
schemathesis --version
schemathesis run "$base/openapi.json" --max-examples "${EXAMPLES:-100}" --seed 1 --phases coverage,fuzzing --workers 1 --request-timeout 30 \
  --checks not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance --no-color
