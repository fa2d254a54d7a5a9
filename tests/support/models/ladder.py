"""A ladder for tests: five files of a fine-tune, measured; figures as a small model on two cores gives them."""

from typing import Any

from models.quality import Answers, Candidate, Loss, LossBudget, MeanScore, Quality, Shape, Speed, Trim


def loss(kl_mean: float, ratio: float = 1.0) -> Loss:
    return Loss(positions=2000, kl_mean=kl_mean, kl_p99=kl_mean * 8, top1_agreement=0.97, perplexity_ratio=ratio)


def answers(correct: int, flips: int, p_value: float = 1.0) -> Answers:
    difference = (correct - 209) / 250
    return Answers(
        total=250,
        correct=correct,
        flips=flips,
        difference_low=difference - 0.02,
        difference_high=difference + 0.02,
        p_value=p_value,
    )


def speed(prefill: float, decode: float, memory_mib: int = 700, samples: tuple[float, ...] = ()) -> Speed:
    return Speed(
        prefill_tokens_per_s=prefill,
        decode_tokens_per_s={1: decode, 8: 2 * decode, 16: 2.3 * decode},
        peak_memory_bytes=memory_mib << 20,
        score_samples_per_s=samples,
    )


def candidate(name: str, size_mib: int, score: float | None, **parts: Any) -> Candidate:
    file = f"tuned-{name}.gguf"
    return Candidate(name=name, file=file, size_bytes=size_mib << 20, sha256="a" * 64, score_per_s=score, **parts)


def ladder(**changes: Any) -> Quality:
    """Q4_0 chosen; Q4_K_M undoes the fine-tune."""
    made = (
        candidate(
            "F16", 518, 4.3, loss=loss(0), answers=answers(209, 0), speed=speed(503, 37), verdict="within budget"
        ),
        candidate(
            "Q8_0", 278, 3.9, loss=loss(0.0004), answers=answers(208, 1), speed=speed(388, 55), verdict="within budget"
        ),
        candidate(
            "Q4_0",
            230,
            4.5,
            loss=loss(0.012),
            answers=answers(208, 3),
            speed=speed(402, 61, samples=(4.4, 4.5, 4.6)),
            verdict="chosen",
            reason="the fastest within the budget: 4.5 examples/s",
        ),
        candidate(
            "IQ4_NL",
            231,
            4.1,
            loss=loss(0.031),
            answers=answers(205, 7),
            speed=speed(380, 58),
            verdict="over budget",
            reason="mean KL divergence 0.031, the budget is 0.02",
        ),
        candidate(
            "Q4_K_M",
            241,
            3.2,
            loss=loss(1.4, 2.1),
            answers=answers(54, 170, 1e-30),
            speed=speed(330, 60),
            verdict="undoes the fine-tune",
            reason="mean KL divergence 1.4 to the fine-tune, 0.01 to its base",
        ),
    )
    whole = Quality(
        work="classify",
        budget=LossBudget(),
        machine="AMD EPYC, 2 cores",
        examples_file="validation.jsonl",
        examples_sha256="e" * 64,
        calibration_examples=100,
        held_out_examples=250,
        noise=loss(0.00008),
        noise_flips=1,
        base_distance=loss(1.5),
        base_check="each file was compared with the base.",
        shape=Shape(prompt_tokens=102, answer_tokens=3, sequences=16, step_tokens=512, threads=2, rounds=3),
        candidates=made,
        chosen="Q4_0",
    )
    return whole.model_copy(update=changes)


def written_ladder() -> Quality:
    """The same files for work to write: the lossier, the lower their ROUGE-L; nearly all texts differ from F16's."""

    def scored(one: Candidate) -> Candidate:
        assert one.answers is not None
        difference = (one.answers.correct - 209) / 250
        interval = {"difference_low": difference - 0.02, "difference_high": difference + 0.02}
        score = MeanScore(metric="ROUGE-L", mean=one.answers.correct / 250, reference_mean=209 / 250, **interval)
        counted = {"correct": 1, "flips": 0 if one.name == "F16" else 200, "score": score}
        return one.model_copy(update={"answers": one.answers.model_copy(update=counted)})

    whole = ladder(work="write")
    floor = MeanScore(metric="ROUGE-L", mean=0.846, reference_mean=0.836, difference_low=-0.001, difference_high=0.021)
    return whole.model_copy(update={"candidates": tuple(map(scored, whole.candidates)), "noise_score": floor})


TRIM = Trim(tokens_before=262144, tokens_after=41042, covered_tokens=0.96, covered_examples=0.13, greedy_agreement=0.98)
