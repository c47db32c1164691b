# JUWELS Booster of JSC (Slurm; 4 A100 a node, 48 cores): SITE=jobs/sites/juwels_booster.sh bash jobs/submit_doctor.sh
# A sample from the site's public documentation, which has changed by the time you read it: `ml spider` tells the names.
# `jutil env activate -p PROJECT` first; the environment is made once, on a login node, with the same modules.
# shellcheck shell=bash
# shellcheck disable=SC2034,SC2154 # batch.sh uses these, and sets RANKS and others

scheduler=slurm
account=PROJECT
partition=booster
submit_options=()

gpus_per_node=4
ranks_per_node=4
cores_per_node=48
gigabytes_per_rank=
numa_of_gpu=(3 1 7 5)
warning=180

load_environment() {
    module --force purge
    module load Stages/2025 GCC OpenMPI CUDA/12 cuDNN MPI-settings/CUDA
    module load Python HDF5 mpi4py
    python=$root/.venv/bin/python
}

choose_launcher() {
    launcher=(srun --wait=60 --ntasks="$RANKS" --cpus-per-task="$cores_per_rank" --cpu-bind=none)
}
