#!/usr/bin/env bash
# curl against a running server: curl.sh http://127.0.0.1:8000. The examples of docs/http.md.
set -euo pipefail
base=${1:?give the address of a server} json='Content-Type: application/json'
curl --version | head -1 | cut -d' ' -f1-2
curl -fsS "$base/v1/completions" -H "$json" -d '{"prompt": "Once upon", "max_tokens": 5, "temperature": 0}' | grep -o '"finish_reason": "[a-z]*"'
curl -fsSN "$base/v1/chat/completions" -H "$json" \
  -d '{"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 5, "stream": true, "stream_options": {"include_usage": true}}' | tail -2 | head -1
curl -fsS "$base/v1/models" | grep -o '"object": "list"'
curl -fsS -o /dev/null -w '/health %{http_code}\n' "$base/health"
curl -sS -o /dev/null -w 'a wrong temperature: %{http_code}\n' "$base/v1/completions" -H "$json" -d '{"prompt": "a", "temperature": -1}'
