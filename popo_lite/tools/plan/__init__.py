"""Plan how much memory a recipe takes before anything is loaded, and what to change if it does not fit."""
