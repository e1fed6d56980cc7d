"""The delta rule with decay, a head (GDN) or a channel (KDA): `reference`, `transpose`, `recurrent`, `op`, `step`."""
