"""Results shown to people: tables, sentences, figures, pages. No models here."""
