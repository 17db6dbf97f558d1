# Sourced by the scripts beside it: makes .venv in the repository's root, or brings it up to date, and puts it
# first on the PATH. An environment that is there is kept, and so is any torch >= 2.11 in it.
#
#   source launch/venv.sh EXTRA     EXTRA: what of setup.py's extras to install (train, dev)
#
#   PYTHON=python3.12               the interpreter to make .venv with; python3 if not set
#   COMMQ_TORCH="torch==2.12.0"     arguments for pip that install torch, in place of the choice below
#   COMMQ_SYSTEM_SITE=1             let a new .venv use the packages of $PYTHON too; it does so anyway where
#                                   there is a GPU and $PYTHON has torch

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

_venv=$ROOT/.venv
_log=$_venv/install.log
_torch=2.13.0
_cpu_index=https://download.pytorch.org/whl/cpu

_say() { echo "commq: $*" >&2; }

_fail() {
  _say "$@"
  exit 1
}

_is_new_enough() { "$1" -c 'import sys; assert sys.version_info >= (3, 10)' 2>/dev/null; }

_has_gpu() { nvidia-smi -L >/dev/null 2>&1; }

_has_torch() {
  "$1" -c 'from importlib.metadata import version
assert tuple(map(int, version("torch").split(".")[:2])) >= (2, 11)' 2>/dev/null
}

_pip_install() {
  "$_venv/bin/python" -m pip install --no-input --disable-pip-version-check --retries 2 --timeout 30 "$@" \
    </dev/null >>"$_log" 2>&1
}

_fail_pip() {
  _fail "could not install $1; is there a network? $(grep '^ERROR' "$_log" | tail -n 1) (more in $_log)"
}

_make() {
  local python=${PYTHON:-python3} site
  _is_new_enough "$python" || _fail "$python is not Python 3.10 or newer; set PYTHON to one that is"
  "$python" -c 'import ensurepip, venv' 2>/dev/null ||
    _fail "$python has no venv module; install it (on Debian and Ubuntu: apt install python3-venv)"
  _say "making .venv with $("$python" --version)"
  "$python" -m venv --clear --without-pip "$_venv" || _fail "could not make $_venv"

  if [[ ${COMMQ_SYSTEM_SITE:-} == 1 ]] || { _has_gpu && _has_torch "$python"; }; then
    # Not by --system-site-packages: that passes over the packages of an environment that $PYTHON belongs to.
    _say ".venv also uses the packages of $("$python" -c 'import sys; print(sys.executable)')"
    site=$("$_venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
    "$python" -c 'import sys; print(*[p for p in sys.path if p.endswith("-packages")], sep="\n")' \
      >"$site/parent.pth"
  fi
}

_install_torch() {
  if [[ -n ${COMMQ_TORCH:-} ]]; then
    _say "installing $COMMQ_TORCH"
    # shellcheck disable=SC2086
    _pip_install $COMMQ_TORCH || _fail_pip "$COMMQ_TORCH"
  elif _has_torch "$_venv/bin/python"; then
    return
  elif [[ $(uname) == Darwin ]] || _has_gpu; then
    _say "installing torch $_torch; with CUDA it is several GB"
    _pip_install "torch==$_torch" || _fail_pip "torch $_torch"
  else
    # "+cpu" can match nothing but a CPU build; the plain version would be the CUDA build.
    _say "installing torch $_torch, CPU build"
    _pip_install "torch==$_torch+cpu" || _pip_install --extra-index-url "$_cpu_index" "torch==$_torch+cpu" ||
      _fail "found no CPU build of torch $_torch for $("$_venv/bin/python" --version); is there a network?" \
        "Otherwise install torch >= 2.11 into .venv yourself, or set COMMQ_TORCH to what pip should install"
  fi
}

_install() {
  local python=$_venv/bin/python extra=$1
  _is_new_enough "$python" || _fail ".venv has a Python older than 3.10; remove .venv and run this again"
  : >"$_log"
  "$python" -m pip --version >/dev/null 2>&1 || "$python" -m ensurepip >>"$_log" 2>&1 ||
    _fail "could not install pip into .venv (more in $_log)"
  _pip_install "setuptools>=64" wheel || _fail_pip setuptools
  _install_torch

  # An isolated build would download a torch of its own, and the constraint keeps the one that is there.
  _say "installing commq[$extra]"
  "$python" -c 'from importlib.metadata import version; print("torch==" + version("torch"))' >"$_venv/torch.txt"
  _pip_install --no-build-isolation --constraint "$_venv/torch.txt" --editable "${ROOT}[$extra]" ||
    _fail_pip "commq[$extra]"
  "$python" -c 'import torch' || _fail "torch does not import; remove .venv and run this again"
}

_ensure() {
  local extra=$1 active=${VIRTUAL_ENV:-${CONDA_PREFIX:-}} stamp=$_venv/$1.stamp inputs
  [[ -z $active || $active == "$_venv" ]] || _say "using $_venv, not the active environment $active"
  [[ -x $_venv/bin/python ]] || _make

  # The stamp is all that the installation depends on, written when it is complete.
  inputs="$ROOT ${COMMQ_TORCH:-} $(cat "$ROOT/setup.py" "$ROOT/pyproject.toml" "$ROOT/launch/venv.sh"; cat "$ROOT"/cuda/* | cksum)"
  if [[ ! -f $stamp || $(<"$stamp") != "$inputs" ]]; then
    _install "$extra"
    echo "$inputs" >"$stamp"
  fi

  unset PYTHONHOME
  export VIRTUAL_ENV=$_venv PATH=$_venv/bin:$PATH
}

_ensure "$1"
