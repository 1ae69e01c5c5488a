"""One recipe per stage; the rooms meet only here."""
