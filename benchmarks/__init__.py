"""The cost of an answer: the same workload against any OpenAI-compatible URL, measured and priced."""
