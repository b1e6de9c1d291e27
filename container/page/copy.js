// Buttons that copy the text of an element, which `data-copy` names.

/** Copies, and says so; where the page may not copy, it selects the text, and the keys can. */
export async function copy(button) {
  const shown = document.getElementById(button.dataset.copy);
  const said = document.getElementById("copied");
  try {
    await navigator.clipboard.writeText(shown.textContent);
  } catch {
    getSelection().selectAllChildren(shown);
    said.textContent = "The text is selected: copy it with the keys.";
    return;
  }
  said.textContent = "Copied.";
  button.textContent = "Copied";
  setTimeout(() => (button.textContent = "Copy"), 2000);
}
