#!/usr/bin/env bash
# Builds the CPU image as the Dockerfile says and runs it, without Docker: by buildah, over a Debian that debootstrap makes
# in place of the base image, in namespaces of its own. As root on Debian, with buildah and debootstrap installed:
#   deploy/check.sh [FOLDER] [buildah's options, such as --build-arg TORCH_INDEX_URL=...]
# In FOLDER (default: a new one) lies what is worth keeping for another run: the bootstrapped Debian, the models.
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
folder=${1:-$(mktemp -d)}
shift || true
mkdir -p "$folder/models" "$folder/root"
chown 10001:10001 "$folder/models"

echo "== the unit, the compose file and the Dockerfile"
if command -v systemd-analyze >/dev/null; then
    mkdir -p "$folder/unit"
    sed 's#^ExecStart=/opt/foregate/bin/foregate#ExecStart=/bin/true#' "$root/deploy/foregate.service" >"$folder/unit/foregate.service"
    systemd-analyze verify "$folder/unit/foregate.service"
fi
if command -v kubectl >/dev/null; then
    for overlay in "$root"/deploy/kubernetes/overlays/*; do kubectl kustomize "$overlay" >/dev/null; done
fi

echo "== a Debian in place of the base image"
[ -e "$folder/debian/etc/debian_version" ] || debootstrap --variant=minbase bookworm "$folder/debian" >/dev/null
container=$(buildah from scratch)
buildah add --quiet "$container" "$folder/debian" /
buildah commit --quiet --rm "$container" localhost/foregate-check-base

echo "== the image"
buildah bud --isolation chroot --build-arg CPU_BASE=localhost/foregate-check-base \
    --build-arg GPU_BASE=localhost/foregate-check-base "$@" --target cpu --tag localhost/foregate-check "$root"
container=$(buildah from localhost/foregate-check)
mounted=$(buildah mount "$container")
trap 'buildah rm "$container" >/dev/null' EXIT
install -d "$mounted/etc/ssl"
touch "$mounted/etc/resolv.conf" "$mounted/etc/ssl/host.crt"

# as a container would run it: user 10001, read-only root, /models and /tmp writable, no new privileges, first process
inside=$folder/inside.sh
cat >"$inside" <<EOF
set -e
mount --make-rprivate /
mount --bind "$mounted" "$folder/root"
mount --bind "$folder/models" "$folder/root/models"
mount -t tmpfs tmpfs "$folder/root/tmp"
mount --bind /etc/resolv.conf "$folder/root/etc/resolv.conf"
mount --bind "\${PIP_CERT:-/etc/ssl/certs/ca-certificates.crt}" "$folder/root/etc/ssl/host.crt"
mount -t proc proc "$folder/root/proc"
mount --rbind /dev "$folder/root/dev"
mount -o remount,bind,ro "$folder/root"
[ -z "\${ALONE:-}" ] || ip link set lo up
exec env -i HOME=/home/foregate PATH=/opt/foregate/bin:/usr/sbin:/usr/bin:/sbin:/bin FOREGATE_HOME=/models HF_HOME=/models/hub \\
    PYTHONUNBUFFERED=1 PIP_CERT=/etc/ssl/host.crt \\
    chroot --userspec=10001:10001 "$folder/root" setpriv --no-new-privs "\$@"
EOF

echo "== pull, with the network"
unshare --mount bash "$inside" foregate pull demo

echo "== the image's own command, without any"
ALONE=1 unshare --mount --net --pid --fork --mount-proc bash "$inside" foregate serve demo --host 0.0.0.0 >"$folder/serve.log" 2>&1 &
outer=$!
for _ in $(seq 300); do
    server=$(pgrep --parent "$outer" || true)
    # the same as the image's HEALTHCHECK
    health="import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/health', timeout=5)"
    if [ -n "$server" ] && nsenter --target "$server" --net --mount --root --wd /opt/foregate/bin/python -c "$health" 2>/dev/null; then
        break
    fi
    kill -0 "$outer" || { tail "$folder/serve.log"; exit 1; }
    sleep 1
done
nsenter --target "$server" --net curl --fail --silent --show-error http://127.0.0.1:8000/v1/chat/completions \
    --header 'Content-Type: application/json' \
    --data '{"messages": [{"role": "user", "content": "What is the capital of France?"}], "temperature": 0}' | grep Paris
[ "$(awk '/^Uid:/ {print $2}' "/proc/$server/status")" = 10001 ]
[ "$(awk '/^CapEff:/ {print $2}' "/proc/$server/status")" = 0000000000000000 ]

echo "== SIGTERM"
kill -TERM "$server"
wait "$outer"
echo "well"
