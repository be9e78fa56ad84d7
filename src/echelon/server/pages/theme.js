// Loaded before anything is painted, so that a chosen theme never flashes in late.
"use strict";
{
  let chosen = null;
  try {
    chosen = localStorage.getItem("echelon-theme");
  } catch {
    // Storage is closed to us: the system's theme it is.
  }
  if (chosen === "dark" || chosen === "light") document.documentElement.dataset.theme = chosen;
}
