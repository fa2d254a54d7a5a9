"""Convert the checkpoints of `families` with transformers and llama.cpp's own converter. Run by the oracle's Python.

    python -m tests.oracle.reference LLAMA_CPP TARGET [NAME ...]

writes, for each case, TARGET/ckpt/NAME/ (a Hugging Face folder) and in TARGET/ref: NAME-f16.gguf and NAME-f32.gguf
(the converter's), NAME-LENGTH.npz (`tokens`, and `logits` in float32 of transformers) and NAME-ids.json (texts, and
their ids by the tokenizers or sentencepiece library).
"""

import json
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sentencepiece import SentencePieceProcessor
from tokenizers import Tokenizer
from transformers import AutoConfig, AutoModelForCausalLM

from tests.oracle.families import BY_NAME, CASES, Case
from tests.oracle.vocabularies import pre_tokenizer, write_vocabulary

_SPREAD = 0.2
TEXTS = (
    "Hello world",
    " leading and  double   spaces, trailing ",
    "I've told you he'll be THERE, WE'RE not; it's 3.50 EUR or 1299 in 2026",
    "def f(x):\n\treturn [x ** 2]  # ok\n\n\n    print(f(12345))\r\n",
    "Größe naïve Straße ÅNGSTRÖM žluťoučký",
    "Быстрая лиса 我想在苹果公司工作 日本語 한국어 문장 🚀😶‍🌫️🦙🦙",
    "'''''''''```````\"\"\"......!!!!!!?????? ------======= x=-1",
    "a\u00a0b\u200bc \ufeff\u0301e",
)


def make_checkpoint(case: Case, folder: Path) -> None:
    """Write the case's Hugging Face folder: random weights, a tokenizer, the configuration as `families` spells it."""
    folder.mkdir(parents=True)
    settings = {**write_vocabulary(folder, case.vocabulary), **case.config, "architectures": [case.architecture]}
    settings["vocab_size"] = case.rows or settings["vocab_size"]
    settings["dtype" if "rope_parameters" in settings else "torch_dtype"] = case.dtype
    (folder / "config.json").write_text(json.dumps(settings, indent=2))
    config = AutoConfig.from_pretrained(folder)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    randomize(model, seed=sum(case.name.encode()))
    model = model.to(getattr(torch, case.dtype))
    n_bytes = sum(tensor.numel() * tensor.element_size() for tensor in model.state_dict().values())
    model.generation_config.update(**case.generation)
    model.save_pretrained(folder, max_shard_size=10**9 if case.shards == 1 else n_bytes // case.shards)
    (folder / "config.json").write_text(json.dumps(settings, indent=2))  # save_pretrained wrote its own


def randomize(model: Any, seed: int) -> None:
    """Fill every parameter with numbers wide enough that an error in any of them shows in the logits."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() == 1:  # a bias, or a norm's weight about its neutral value: 1, Gemma's 0
                parameter.copy_(parameter + _SPREAD * noise)
            else:
                parameter.copy_(noise * (1.0 if "embed" in name else 1.2) / parameter.shape[-1] ** 0.5)


def save_logits(case: Case, folder: Path, target: Path) -> None:
    """Save transformers' logits in float32 for random tokens, of each of the case's lengths."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    for length in case.lengths:
        tokens = np.random.default_rng(length).integers(3, 400, length)
        logits = model(torch.from_numpy(tokens)[None], use_cache=False).logits[0]
        np.savez(target / f"{case.name}-{length}.npz", tokens=tokens.astype(np.int32), logits=logits.numpy())


def save_ids(case: Case, folder: Path, target: Path) -> None:
    """Save the ids of each text, nothing added, by the library that reads the tokenizer's file."""
    if (folder / "tokenizer.json").is_file():
        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        ids = {text: tokenizer.encode(text, add_special_tokens=False).ids for text in TEXTS}
    else:
        pieces = SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
        ids = {text: pieces.encode(text) for text in TEXTS}
    (target / f"{case.name}-ids.json").write_text(json.dumps(ids))


def convert(case: Case, folder: Path, target: Path, kind: str) -> None:
    """Convert with llama.cpp's own converter, as its command line would with --outtype `kind`.

    It recognises a pre-tokenizer by a hash of the ids that a published vocabulary gives; ours are not published, so
    it is told what it would have found out.
    """
    import gguf
    from conversion import ModelBase, ModelType, TextModel, get_model_architecture, get_model_class

    TextModel.get_vocab_base_pre = lambda _self, _tokenizer: pre_tokenizer(case.vocabulary)
    architecture = get_model_architecture(ModelBase.load_hparams(folder, False), ModelType.TEXT)
    file_type = {"f16": gguf.LlamaFileType.MOSTLY_F16, "f32": gguf.LlamaFileType.ALL_F32}[kind]
    get_model_class(architecture)(folder, file_type, target).write()


def prepare() -> Path:
    """Read the command line: let llama.cpp's converter be imported, and return the folder to write to."""
    llama_cpp, target = Path(sys.argv[1]), Path(sys.argv[2])
    sys.path[:0] = [str(llama_cpp), str(llama_cpp / "gguf-py")]
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    (target / "ref").mkdir(parents=True, exist_ok=True)
    return target


def main() -> None:
    """Make everything, or only the named cases."""
    target = prepare()
    references = target / "ref"
    with torch.inference_mode():
        for case in [BY_NAME[name] for name in sys.argv[3:]] or CASES:
            folder = target / "ckpt" / case.name
            make_checkpoint(case, folder)
            save_logits(case, folder, references)
            save_ids(case, folder, references)
            if case.said:
                config = folder / "config.json"
                config.write_text(json.dumps(json.loads(config.read_text()) | case.said, indent=2))
            for kind in ("f16", "f32") if case.converter else ():
                convert(case, folder, references / f"{case.name}-{kind}.gguf", kind)
            print(case.name, flush=True)


if __name__ == "__main__":
    main()
