"""What several test modules share: small stores, runs for reports, and a cache of the hub."""
