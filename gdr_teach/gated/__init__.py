"""The delta rule with decay, a head (GDN) or a channel (KDA), in the files that every rule has; `reference` first."""
