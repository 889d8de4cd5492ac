"""Push the output folder of a run to the Hub."""

from pathlib import Path

from huggingface_hub import CommitInfo, HfApi
from transformers import TrainingArguments


# Checkpoints, locks and other files that begin with an underscore, also in subfolders, such as one per seed.
IGNORED = ["_*", "*/_*", "checkpoint-*", "*/checkpoint-*"]


def prepare_push(args: TrainingArguments) -> None:
    """Create the repository of a run and check the permission to write to it, before the training starts.

    The repository is `args.hub_model_id`, by default the name of the output folder, and private if
    `args.hub_private_repo`. The token is `args.hub_token`, `HF_TOKEN` or that of `hf auth login`. Sets
    `args.hub_model_id` to the full name with the owner. Does nothing without `args.push_to_hub`, and in all processes
    but the main one.

    Raises:
        HfHubHTTPError: the token is missing or invalid, or has no permission to write to the repository.
    """
    if not args.push_to_hub or args.process_index != 0:
        return
    api = HfApi(token=args.hub_token)
    name = args.hub_model_id or Path(str(args.output_dir)).resolve().name
    args.hub_model_id = api.create_repo(name, private=args.hub_private_repo, exist_ok=True).repo_id
    # create_repo also succeeds for an existing repository that may only be read.
    api.auth_check(args.hub_model_id, write=True)


def push_run(args: TrainingArguments, commit_message: str = "End of training") -> CommitInfo | None:
    """Push the output folder of a finished run in one commit, after `prepare_push(args)`.

    Unlike `Trainer.push_to_hub`, it does not overwrite the model card.

    Returns:
        The commit, or None without `args.push_to_hub` and in all processes but the main one.
    """
    if not args.push_to_hub or args.process_index != 0:
        return None
    assert args.hub_model_id is not None and "/" in args.hub_model_id, "call prepare_push(args) first"
    commit = HfApi(token=args.hub_token).upload_folder(
        repo_id=args.hub_model_id,
        folder_path=str(args.output_dir),
        commit_message=commit_message,
        revision=args.hub_revision,
        ignore_patterns=list(IGNORED),
    )
    print(f"Pushed to {commit.repo_url}", flush=True)
    return commit
