#!/bin/sh
# Issues what is missing below /certs: the authority, the coordinator's, an operator's and every named site's certificate.
set -eu
authority=/certs/authority

party() { # NAME ROLE [OPTION...]
  name=$1 role=$2
  shift 2
  [ -e "/certs/$name/$name.crt" ] || fedhds certs issue "$name" --role "$role" --ca $authority --out "/certs/$name" "$@"
  chown -R 10001:10001 "/certs/$name"
}

[ -e $authority/ca.crt ] || fedhds certs init --out $authority
party coordinator coordinator --host coordinator
party operator operator
for site in "$@"; do
  party "$site" site
done
