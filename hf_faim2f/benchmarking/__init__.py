"""Latency, throughput and memory of models in any runtime, as JSON, a table and a plot."""
