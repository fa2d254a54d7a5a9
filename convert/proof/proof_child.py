"""The child process that compares two tokenizers: `python -m convert.proof.proof_child`, with jobs on standard input.

The first job names the folders of the tokenizer, which is loaded at once, and of the chat template. The second names
the converted vocabulary's file, the texts and conversations to compare, and the file for the result.
"""

import sys
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from convert.child import read_job, tell
from convert.errors import TokenizerInvalid, VerifyFailed
from models.common.machine import give_back_freed

from .parity import TokenizerPair, check_template, check_tokenizer, open_pair
from .proof import DIFFERENT, UNREADABLE, ProofResult
from .reference import open_reference


def main() -> int:
    """Do both jobs. An error is one line on standard output and an exit code."""
    try:
        first = read_job()
        folder = Path(first["folder"])
        reference = open_reference(folder)
        give_back_freed()  # the library read a large file
        job = read_job()
        found = _compare(open_pair(Path(job["vocabulary"]), folder, reference), Path(first["template"]), job)
        Path(job["result"]).write_bytes(TypeAdapter(ProofResult).dump_json(found))
    except TokenizerInvalid as error:
        tell(str(error).replace("\n", " "))
        return UNREADABLE
    except (VerifyFailed, OSError) as error:
        tell(str(error).replace("\n", " "))
        return DIFFERENT
    return 0


def _compare(pair: TokenizerPair, template: Path, job: dict[str, Any]) -> ProofResult:
    tokens = check_tokenizer(pair, job["texts"], tell)
    prompts = check_template(pair, job["conversations"], template)
    return ProofResult(
        n_texts=tokens.n_texts,
        n_tokens=tokens.n_tokens,
        n_prompts=prompts.n_compared,
        warnings=tuple(f"llama.cpp only approximates this tokenizer: {mismatch}" for mismatch in tokens.mismatches)
        + prompts.skipped,
        notes=(*tokens.limits, *prompts.warnings),
    )


if __name__ == "__main__":
    sys.exit(main())
