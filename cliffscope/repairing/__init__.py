"""Repair: fine-tuning on the selected examples, and the comparison before and after."""
