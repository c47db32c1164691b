# The settings of a site, for all batch jobs: change them here, or copy this file and name the copy in SITE.
# Samples for two real sites are in sites/.
# shellcheck shell=bash
# shellcheck disable=SC2034,SC2154 # batch.sh and the file of the scheduler use these, and set RANKS and others

scheduler=slurm # slurm, pbs (PBS Pro, OpenPBS) or lsf
account= # whom to charge; empty: your default (sbatch --account, qsub -A, bsub -P)
partition= # Slurm's partition, or the queue; empty: the default
submit_options=() # more for sbatch, qsub or bsub, such as (--qos=normal --constraint=a100)

gpus_per_node=4 # 0 for nodes without
ranks_per_node=$gpus_per_node # one rank a GPU; without GPUs write a number here: a rank for some cores
cores_per_node=64
gigabytes_per_rank= # of memory, asked for; empty: the scheduler's default, which may be little
# The NUMA domain next to each GPU, in the order of the GPUs (`nvidia-smi topo -m` shows it), such as (3 1 0 2): each rank
# then has the cores and the memory of that of its GPU (numactl), whatever cores the launcher gave it. Empty: left alone.
numa_of_gpu=()

# Seconds before the end of the wall time at which a run is told to stop: for an iteration, a checkpoint and a requeue.
warning=120

# Called by each job on its first node. Set `python`, the one with apts_mpi, by its full path.
load_environment() {
    # module purge
    # module load python openmpi cuda
    python=$root/.venv/bin/python
}

# Set `launcher`, which starts $RANKS ranks, $ranks_on_node on each node, each bound to $cores_per_rank cores of its own.
# Each rank sees all GPUs of its node and takes the one of its number there. Do not give each its own by --gpus-per-task
# or --gpu-bind: ranks that cannot see each other's GPUs cannot exchange device memory.
choose_launcher() {
    # Slurm. `srun --mpi=list` shows what it speaks: pmix for Open MPI; pmi2 for MPICH; for Cray MPICH cray_shasta, most
    # often the default, so leave --mpi out; pmi2 for Intel MPI, with `export I_MPI_PMI_LIBRARY=/…/libpmi2.so`, Slurm's.
    # --cpus-per-task stands here, as srun does not take it from sbatch any more (Slurm 22.05 and newer).
    # --wait: seconds until the others end, too, after a rank has ended; without it they would keep the nodes to the last.
    launcher=(srun --wait=60 --mpi=pmix --ntasks="$RANKS" --cpus-per-task="$cores_per_rank" --cpu-bind=cores)

    # Open MPI's own launcher, under any scheduler:
    # launcher=(mpirun -n "$RANKS" --map-by "ppr:$ranks_on_node:node:PE=$cores_per_rank" --bind-to core)

    # MPICH's own (Hydra):
    # launcher=(mpiexec -n "$RANKS" -ppn "$ranks_on_node" -bind-to "core:$cores_per_rank")

    # Cray MPICH under PBS Pro (PALS):
    # launcher=(mpiexec -n "$RANKS" --ppn "$ranks_on_node" --depth "$cores_per_rank" --cpu-bind depth)

    # Intel MPI's own; it binds a rank to a domain of OMP_NUM_THREADS cores, which the job sets:
    # export I_MPI_PIN_DOMAIN=omp
    # launcher=(mpiexec -n "$RANKS" -ppn "$ranks_on_node")
}
