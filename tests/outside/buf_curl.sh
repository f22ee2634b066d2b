#!/usr/bin/env bash
# A client that is not ours, `buf curl` of the npm package @bufbuild/buf, against a running server: health, reflection,
# and calls whose messages it knows from reflection alone. Prints every command and its answer; ends where one fails.
#   buf_curl.sh HOST:PORT                       a server on loopback
#   buf_curl.sh HOST:PORT CA.pem HEADERS        TLS; HEADERS is a file with the line "authorization: Bearer TOKEN", of a
#                                               token for generate and control
# BUF=... names the program where it is not on the PATH.
set -euo pipefail
address=${1:?give HOST:PORT of a server}
if [ $# -ge 3 ]; then
  url=https://$address with=(--protocol grpc --cacert "$2" --header "@$3" --reflect-header "@$3")
else
  url=http://$address with=(--protocol grpc --http2-prior-knowledge)
fi

ask() {  # a path, then arguments
  local path=$1 word; shift
  printf '$ buf curl'
  for word in "${with[@]}" "$@" "$url$path"; do [[ $word == *[{\"]* ]] && word="'$word'"; printf ' %s' "$word"; done
  echo
  "${BUF:-buf}" curl "${with[@]}" "$@" "$url$path"
}

prompt='"prompts":[{"tokenIds":{"ids":[2,1,0,1,2,0]}}],"sampling":{"temperature":0,"seed":1}'
echo '$ buf --version'; "${BUF:-buf}" --version
ask /grpc.health.v1.Health/Check --data '{}'
ask /grpc.health.v1.Health/Check --data '{"service":"tp_decoders.v1.Control"}'
ask "" --list-services
ask /tp_decoders.v1.Inference/Generate --data "{\"requestId\":\"outside\",$prompt,\"stopping\":{\"maxNewTokens\":6}}"
ask /tp_decoders.v1.Inference/GenerateStream --data "{\"requestId\":\"outside-2\",$prompt,\"stopping\":{\"maxNewTokens\":2}}"
