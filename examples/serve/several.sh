#!/usr/bin/env bash
# A `vkvx serve` for each GPU and nginx before them: several.sh BUNDLE 0 1 (numbers of GPUs, or cpu for one without).
# All have the key VKVX_API_KEY. PORT (8080) is nginx's, those of the servers follow it. Ctrl-C and SIGTERM stop all.
set -euo pipefail
bundle=${1:?several.sh BUNDLE 0 1}; shift
: "${VKVX_API_KEY:?set it: behind a proxy servers answer only if they have a key}"
for tool in vkvx nginx curl; do
  command -v "$tool" > /dev/null || { echo "$tool is not installed, or not on the PATH" >&2; exit 2; }
done
port=${PORT:-8080} folder=$(mktemp -d) pids=() upstream=
chmod 711 "$folder"  # nginx works as another user where it is started by root
trap 'kill "${pids[@]}" 2>/dev/null || true; wait; rm -r "$folder"' EXIT
trap 'exit 0' INT TERM

for gpu in "${@:?several.sh BUNDLE 0 1}"; do
  own=$((port + ${#pids[@]} + 1)) provider=cuda
  if [ "$gpu" = cpu ]; then gpu='' provider=cpu; fi
  # With --provider cuda the number of a GPU that is not there ends the server, in place of sending it to the CPU.
  CUDA_VISIBLE_DEVICES=$gpu vkvx serve "$bundle" --port "$own" --provider "$provider" ${OPTIONS:-} &
  pids+=($!)
  upstream+="server 127.0.0.1:$own;"
done

cat > "$folder/nginx.conf" <<EOF
daemon off;
pid $folder/pid;
error_log stderr error;
events {}
http {
    access_log off;
    client_body_buffer_size 1m;
    client_body_temp_path $folder/body;
    proxy_temp_path $folder/proxy;
    fastcgi_temp_path $folder/fastcgi;
    uwsgi_temp_path $folder/uwsgi;
    scgi_temp_path $folder/scgi;
    client_max_body_size 64m;
    map \$http_x_conversation \$conversation { '' \$request_id; default \$http_x_conversation; }
    upstream vkvx { hash \$conversation consistent; $upstream keepalive 16; }
    server {
        listen 127.0.0.1:$port;
        location = /metrics { deny all; }
        location / {
            proxy_pass http://vkvx;
            proxy_http_version 1.1;
            proxy_set_header Connection '';
            proxy_buffering off;
            proxy_read_timeout 300s;
        }
    }
}
EOF

for index in "${!pids[@]}"; do
  until curl --silent --fail "http://127.0.0.1:$((port + index + 1))/health" > "$folder/health"; do
    kill -0 "${pids[index]}" 2> /dev/null || exit 1  # it has ended, and said why
    sleep 0.5
  done
done
nginx -p "$folder" -c "$folder/nginx.conf" &
pids+=($!)
echo "http://127.0.0.1:$port/v1" >&2
wait -n
echo "one of the processes has ended" >&2
exit 1
