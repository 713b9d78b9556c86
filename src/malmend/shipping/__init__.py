"""What becomes of edits: kept in a ledger."""
