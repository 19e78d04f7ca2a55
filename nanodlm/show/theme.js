// The button #theme switches to the other theme, which the browser remembers.
const darkScheme = matchMedia('(prefers-color-scheme: dark)');
let chosenTheme = null;  // The system's, until one is chosen.
try { chosenTheme = localStorage.getItem('nanodlm-theme'); } catch { /* A private window. */ }
function setTheme() {
  const root = document.documentElement, button = document.getElementById('theme');
  const now = chosenTheme || (darkScheme.matches ? 'dark' : 'light');
  const other = now === 'dark' ? 'light' : 'dark';
  root.style.colorScheme = now;
  button.textContent = other === 'dark' ? 'Dark' : 'Light';
  button.setAttribute('aria-label', `Switch to the ${other} theme`);
  button.onclick = () => {
    chosenTheme = other;
    try { localStorage.setItem('nanodlm-theme', other); } catch { /* A private window. */ }
    setTheme();
  };
}
darkScheme.onchange = setTheme;
setTheme();
