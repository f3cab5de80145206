# shellcheck shell=bash
# The environment that all recipes share. Use: . launch/env.sh
# What is set already stays as it is, so that a cluster's own settings win.

# Compiled programs, kept between runs. JAX runs what it finds there: a directory of yours alone, of which `doctor` makes sure.
export JAX_COMPILATION_CACHE_DIR="${JAX_COMPILATION_CACHE_DIR:-$HOME/.cache/referee_jax/programs}"
(umask 077 && mkdir -p "$JAX_COMPILATION_CACHE_DIR")

# Downloaded checkpoints; on a cluster a shared file system, filled once where there is a network.
export HF_HOME="${HF_HOME:-$HOME/.cache/huggingface}"

# Seconds before a file of the hub is given up, instead of the default 10, which a loaded network exceeds.
export HF_HUB_DOWNLOAD_TIMEOUT="${HF_HUB_DOWNLOAD_TIMEOUT:-60}"

# Offline clusters: HF_HUB_OFFLINE=1 keeps every process from asking the hub first.
# export HF_HUB_OFFLINE=1

# Log lines at once, also where they are written to a file.
export PYTHONUNBUFFERED=1

# No pool of threads in the tokenizers: prompts are few, and forking after it began is warned of.
export TOKENIZERS_PARALLELISM="${TOKENIZERS_PARALLELISM:-false}"

# GPU: the share of its memory that JAX takes at the start; the default 0.75 leaves a quarter to nobody.
export XLA_PYTHON_CLIENT_MEM_FRACTION="${XLA_PYTHON_CLIENT_MEM_FRACTION:-0.92}"

# CPU libraries beside JAX (PIL, NumPy): one thread for each process that shares a host.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
