# Polaris of ALCF (PBS Pro, Cray MPICH; 4 A100 a node, 32 cores): SITE=jobs/sites/polaris.sh bash jobs/submit_doctor.sh
# A sample from the site's public documentation, which has changed by the time you read it: `module avail conda` tells.
# mpi4py has to be built with Cray's compiler wrapper, once: MPICC="cc -shared" pip install --no-binary mpi4py mpi4py
# shellcheck shell=bash
# shellcheck disable=SC2034,SC2154 # batch.sh uses these, and sets RANKS and others

scheduler=pbs
account=PROJECT
partition=prod
submit_options=(-l filesystems=home:eagle)

gpus_per_node=4
ranks_per_node=4
cores_per_node=32
gigabytes_per_rank=
numa_of_gpu=(3 2 1 0)
warning=180

load_environment() {
    module use /soft/modulefiles
    module load conda
    conda activate
    python=$root/.venv/bin/python
}

choose_launcher() {
    launcher=(mpiexec -n "$RANKS" --ppn "$ranks_on_node" --depth "$cores_per_rank" --cpu-bind depth)
}
