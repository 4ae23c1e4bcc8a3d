"""The commands `shallow-pi NAME`, which `scripts/` of a clone call: parse, call, print."""
