#!/bin/bash
# One training on several machines of a SLURM cluster. The job saves before its time is up and goes back into the
# queue; it goes on where it was, also on another number of machines.
#   sbatch examples/slurm_train.sh llamagen_c2i --row 3b --store /shared/imagenet --out /shared/3b
#SBATCH --job-name=arra
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:USR1@300
set -u

head_node=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)

# torchrun passes SIGTERM on to the trainings, which save and leave; it must give them the time to.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=240
# srun does not take the number of cores from above by itself.
srun --cpus-per-task "$SLURM_CPUS_PER_TASK" torchrun \
    --nnodes "$SLURM_JOB_NUM_NODES" --nproc-per-node 8 \
    --rdzv-id "$SLURM_JOB_ID" --rdzv-backend c10d --rdzv-endpoint "$head_node:29500" \
    --max-restarts 3 \
    -m arra train "$@" &
step=$!

# SLURM tells this script five minutes before the end (B:USR1@300).
trap 'echo "time is nearly up: saving, then back into the queue"; scancel --signal=TERM "$SLURM_JOB_ID.0"; wait "$step"; scontrol requeue "$SLURM_JOB_ID"; exit 0' USR1
wait "$step"
