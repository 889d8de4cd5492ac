#!/bin/bash
# Two machines with eight GPUs each under SLURM. The job saves a checkpoint and queues itself again before its time is
# over, and resumes when it starts again, also after SLURM has requeued it because a machine died:
#
#     sbatch recipes/launch/slurm.sh recipes/pretrain.py --config recipes/configs/bookcorpus.yaml --ddp_timeout 600
#
# The clone, its environment and the output folder must be on a file system that all machines share.
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=32
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
# SIGTERM to this script 300 seconds before the time is over
#SBATCH --signal=B:TERM@300

first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
srun torchrun --nnodes "$SLURM_NNODES" --nproc_per_node "$SLURM_GPUS_ON_NODE" \
    --rdzv_backend c10d --rdzv_id "$SLURM_JOB_ID-${SLURM_RESTART_COUNT:-0}" --rdzv_endpoint "$first:${MASTER_PORT:-29500}" \
    --shutdown_timeout 240 "$@" --resume_from_checkpoint auto &
run=$!

# srun passes the signal on to torchrun, which passes it on to its processes. They save after their step.
trap 'stopped=true; kill -TERM "$run"' TERM
wait "$run"
code=$?
# a signal ends `wait` before the run has ended
while kill -0 "$run" 2> /dev/null; do
    wait "$run"
    code=$?
done
if [ "$stopped" = true ] && [ "$code" -ne 0 ]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
