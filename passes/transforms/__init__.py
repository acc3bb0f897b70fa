"""Graph passes: rewrites that know no codec."""
