"""What an answer costs: the same workload against any OpenAI-compatible URL, measured and priced."""
