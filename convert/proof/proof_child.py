"""The process that compares two tokenizers: `python -m convert.proof.proof_child`, its jobs on its standard input.

The first names the folder, whose tokenizer is loaded at once; the second, when there is one, the file with the
vocabulary that was made of it, and what to compare on. What was found is written to the file that it names.
"""

import sys
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from convert.child import read_job, tell
from convert.errors import TokenizerInvalid, VerifyFailed

from .parity import TokenizerPair, check_tokenizer, open_pair
from .proof import DIFFERENT, UNREADABLE, ProofResult
from .reference import open_reference
from .templates import check_template


def main() -> int:
    """Do both jobs; what goes wrong is one line on standard output, and the exit code."""
    try:
        folder = Path(read_job()["folder"])
        reference = open_reference(folder)
        job = read_job()
        found = _compare(open_pair(Path(job["vocabulary"]), folder, reference), job)
        Path(job["result"]).write_bytes(TypeAdapter(ProofResult).dump_json(found))
    except TokenizerInvalid as error:
        tell(str(error).replace("\n", " "))
        return UNREADABLE
    except (VerifyFailed, OSError) as error:
        tell(str(error).replace("\n", " "))
        return DIFFERENT
    return 0


def _compare(pair: TokenizerPair, job: dict[str, Any]) -> ProofResult:
    tokens = check_tokenizer(pair, job["texts"], tell)
    prompts = check_template(pair, job["conversations"])
    return ProofResult(
        n_texts=tokens.n_texts,
        n_tokens=tokens.n_tokens,
        n_prompts=prompts.n_compared,
        warnings=tuple(f"llama.cpp comes only near this tokenizer: {mismatch}" for mismatch in tokens.mismatches),
        notes=(*tokens.limits, *prompts.warnings),
    )


if __name__ == "__main__":
    sys.exit(main())
