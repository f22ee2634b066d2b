# Sourced before every `ray start` of the files beside this one:  . ~/tp-decoders/launch/ray/node.sh aws|gcp|own
# The one place for a node's network interfaces and for the settings of Ray that need the environment. What is set already
# (in ~/.bashrc of a node, say) is left as it is.

# ---- network ---------------------------------------------------------------------------------------------------------
# Ranks of one node talk through NVLink or shared memory; ranks of several nodes through what is chosen here.
# NCCL: the interface of its first contact, and of everything where there is no faster way. Default: the one that leads to
# the head. `ip -o addr` lists them; they may have other names on other nodes.
_leading_to_head() { ip -o route get "${RAY_HEAD_IP:-}" 2>/dev/null | sed -n 's/.* dev \([^ ]*\).*/\1/p'; }
export NCCL_SOCKET_IFNAME="${NCCL_SOCKET_IFNAME:-${TP_INTERFACE:-$(_leading_to_head)}}"
[ -n "$NCCL_SOCKET_IFNAME" ] || unset NCCL_SOCKET_IFNAME  # the head itself, which has no ranks
# gloo (CPU ranks, and commands between GPU ranks) needs no setting: each rank takes the interface that leads to rank 0.
export NCCL_DEBUG="${NCCL_DEBUG:-WARN}"  # INFO says which network and which interface NCCL took

case "${1:?node.sh: say which network: aws, gcp or own}" in
aws)  # Elastic Fabric Adapter, through aws-ofi-nccl of the deep learning images. NCCL_DEBUG=INFO must say "Selected provider is efa".
  export FI_PROVIDER="${FI_PROVIDER:-efa}" FI_EFA_USE_DEVICE_RDMA="${FI_EFA_USE_DEVICE_RDMA:-1}" ;;
gcp)  # gVNIC: plain TCP; more streams use more of it.
  export NCCL_NSOCKS_PERTHREAD="${NCCL_NSOCKS_PERTHREAD:-4}" NCCL_SOCKET_NTHREADS="${NCCL_SOCKET_NTHREADS:-4}" ;;
own)  # InfiniBand or RoCE where there is any: NCCL finds it by itself. To choose: NCCL_IB_HCA=mlx5_0,mlx5_1; to do without:
  : ;; # NCCL_IB_DISABLE=1
*) echo "node.sh: $1 is no network known here; choose aws, gcp or own" >&2; exit 2 ;;
esac

# ---- Ray -------------------------------------------------------------------------------------------------------------
export RAY_AUTH_MODE=token  # nobody without ~/.ray/auth_token talks to this cluster
if [ ! -s "$HOME/.ray/auth_token" ]; then
  echo "node.sh: no ~/.ray/auth_token here; run 'ray get-auth-token --generate' where you run 'ray up', then 'ray up' again" >&2
  exit 2
fi
chmod 600 "$HOME/.ray/auth_token"
export RAY_USAGE_STATS_ENABLED=0
export RAY_worker_niceness=0  # Ray's 15 starves the ranks on a machine that does anything else
export RAY_DEDUP_LOGS=0 TORCH_CPP_LOG_LEVEL=ERROR
# CPU ranks keep freed memory for the next step instead of having the system zero it anew.
export MALLOC_ARENA_MAX=1 MALLOC_MMAP_THRESHOLD_=4294967296 MALLOC_TRIM_THRESHOLD_=17179869184
# A node behind a dead link is noticed in about six seconds (Ray's defaults: a minute). Read by the head.
export RAY_health_check_initial_delay_ms=2000 RAY_health_check_period_ms=1000
export RAY_health_check_timeout_ms=1000 RAY_health_check_failure_threshold=3
unset OMP_NUM_THREADS  # Ray's ssh wrapper sets 1, which would hold for every rank
ulimit -n 65536 2>/dev/null || ulimit -n "$(ulimit -Hn)"
ulimit -l unlimited 2>/dev/null || true  # pinned memory of EFA and InfiniBand
