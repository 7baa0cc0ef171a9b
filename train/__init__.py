"""Fine-tuning: from a mix manifest to a run card."""
