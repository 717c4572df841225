#!/bin/bash
# Tables of the paper as a SLURM job array: every job makes a part of the runs, the one that ends last writes the whole
# tables. A job saves before its time is up and goes back into the queue. Without --array one job makes everything, and
# what an array has left.
#   sbatch --array=0-3 examples/slurm_reproduce.sh table5 --scale full --seeds 1 --ranks 8 --out /shared/paper
#   sbatch --array=0-7 examples/slurm_reproduce.sh appendix6 --scale full --ranks 4 --out /shared/paper --reference imagenet-256=/shared/VIRTUAL.npz
#SBATCH --job-name=arra-tables
#SBATCH --nodes=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:USR1@300
set -u

# The trainings of one run get this long to save.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=240
part=()
if [ -n "${SLURM_ARRAY_TASK_ID:-}" ]; then part=(--shard "$SLURM_ARRAY_TASK_ID/$SLURM_ARRAY_TASK_COUNT"); fi

set -m # the command and its runs are a group of processes of their own
arra reproduce "$@" --devices "$CUDA_VISIBLE_DEVICES" "${part[@]}" &
tables=$!

# SLURM tells this script five minutes before the end (B:USR1@300). Trainings whose command has gone save and leave.
leave() {
    echo "time is nearly up: saving, then back into the queue"
    kill -TERM "$tables"
    for ((second = 0; second < 240; second++)); do
        kill -0 -- "-$tables" 2> /dev/null || break
        sleep 1
    done
    scontrol requeue "$SLURM_JOB_ID"
    exit 0
}
trap leave USR1
wait "$tables"
