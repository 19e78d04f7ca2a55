// Returns text in which characters without a shape of their own are visible.
function visible(text) {
  return text.replace(/\r?\n|[\u0000-\u001f\u007f-\u009f\u00ad\u061c\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff]/g,
    c => {
      if (c.endsWith('\n')) return (c.length > 1 ? point('\r') : '') + '\u21b5\n';
      return c === '\t' ? '\u2192\t' : point(c);
    });
}
const point = c =>
  '\u2039U+' + c.charCodeAt(0).toString(16).toUpperCase().padStart(4, '0') + '\u203a';
