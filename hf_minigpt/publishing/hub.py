"""A run's folder on the Hub: model, tokenizer, code, generation config, card and plots."""

from pathlib import Path

from huggingface_hub import CommitInfo, HfApi
from transformers import TrainingArguments


# Checkpoints, and what begins with an underscore (locks, checkpoints set aside): the Trainer leaves them out too, but
# not those of runs in folders of the folder.
STAYS_HERE = ["_*", "*/_*", "checkpoint-*", "*/checkpoint-*"]


def prepare_push(args: TrainingArguments) -> None:
    """Make the repository that `--push_to_hub` asks for, and see that it may be written, before anything takes long.

    It is `args.hub_model_id`, by default named like the output folder, private if `args.hub_private_repo`; the token
    is `args.hub_token`, `HF_TOKEN` or that of `hf auth login`. The full name, with its owner, is then in
    `args.hub_model_id`. Without `args.push_to_hub`, or in any process but the first, nothing happens.

    Raises:
        HfHubHTTPError: no token, a wrong one, or one that may not write there.
    """
    if not args.push_to_hub or args.process_index != 0:
        return
    api = HfApi(token=args.hub_token)
    name = args.hub_model_id or Path(str(args.output_dir)).resolve().name
    args.hub_model_id = api.create_repo(name, private=args.hub_private_repo, exist_ok=True).repo_id
    # somebody else's repository that can be read passes the line above
    api.auth_check(args.hub_model_id, write=True)


def push_run(args: TrainingArguments, commit_message: str = "End of training") -> CommitInfo | None:
    """Push the folder of a finished run as it lies, in one commit, after `prepare_push(args)`.

    `Trainer.push_to_hub` would first write a card over the recipe's own.

    Returns:
        The commit; None without `args.push_to_hub` and in all processes but the first.
    """
    if not args.push_to_hub or args.process_index != 0:
        return None
    assert args.hub_model_id is not None and "/" in args.hub_model_id, "prepare_push(args) comes first"
    commit = HfApi(token=args.hub_token).upload_folder(
        repo_id=args.hub_model_id,
        folder_path=str(args.output_dir),
        commit_message=commit_message,
        revision=args.hub_revision,
        ignore_patterns=list(STAYS_HERE),
    )
    print(f"Pushed to {commit.repo_url}", flush=True)
    return commit
