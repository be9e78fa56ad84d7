// Loaded before the first paint, so that the page never shows the wrong theme.
"use strict";
{
  let chosen = null;
  try {
    chosen = localStorage.getItem("echelon-theme");
  } catch {
    // No access to storage: use the system's theme.
  }
  if (chosen === "dark" || chosen === "light") document.documentElement.dataset.theme = chosen;
}
