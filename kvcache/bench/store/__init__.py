"""The throughput of stores."""
