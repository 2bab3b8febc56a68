"""Recorded loads: the value and its files, a writer beside the job, and what Megatron-LM writes."""
