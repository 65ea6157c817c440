#!/bin/bash
# One worker of a capture per array task. Submit with: sbatch --array=0-7 runbooks/capture-slurm.sh RUN.toml
#SBATCH --job-name=stillroom-capture
#SBATCH --gpus-per-task=1
#SBATCH --cpus-per-task=8
#SBATCH --mem=64G
#SBATCH --time=12:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
# A preempted task ends with SIGTERM, is queued again and goes on at its first missing shard.
set -u
run_file=${1:?usage: sbatch --array=0-N capture-slurm.sh RUN.toml}
exec srun stillroom capture "$run_file" \
    --rank "$SLURM_ARRAY_TASK_ID" \
    --world-size "$SLURM_ARRAY_TASK_COUNT" \
    --on-error quarantine
