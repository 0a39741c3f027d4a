"""Methods: SFT and preference losses."""
