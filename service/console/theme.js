// Before the first paint, and so no module: the theme that was chosen here before, if one was.
try {
  const chosen = localStorage.getItem("safegraft.theme");
  if (chosen === "light" || chosen === "dark") document.documentElement.dataset.theme = chosen;
} catch {
  // Storage is blocked: the system's theme holds.
}
