// The advice when to try again.

const shown = document.getElementById("retry");
let ends = 0; // when trying again may help, by Date.now()

/** @param seconds until a repeat may succeed, or null where nobody knows. */
export function advise(seconds) {
  ends = Date.now() + 1000 * (seconds ?? 0);
  shown.hidden = false;
  tick();
}

export function adviseNothing() {
  shown.hidden = true;
}

function tick() {
  const left = Math.ceil((ends - Date.now()) / 1000);
  shown.textContent = left > 0 ? `Trying again may help in ${left} s.` : "Trying again may help now.";
  if (left > 0 && !shown.hidden) setTimeout(tick, 250);
}
