"""The default model, email-triage: its data, the recipe that made it, and the adapter."""
