"""`navit views` and `navit budget`: strategies side by side, and which one to take."""
