// What is wrong with a page, in its own measures: a list of sentences as JSON.
(() => {
  const wrong = [], seen = e => e.checkVisibility({visibilityProperty: true, opacityProperty: true});
  if (document.documentElement.scrollWidth > window.innerWidth)
    wrong.push(`the page is ${document.documentElement.scrollWidth} wide in a window of ${window.innerWidth}`);
  const scrolls = e => { for (let p = e; p; p = p.parentElement)
    if (['auto', 'scroll'].includes(getComputedStyle(p).overflowX)) return true; return false; };
  const words = e => e.textContent.trim().replace(/\s+/g, ' ').slice(0, 50);
  for (const e of document.querySelectorAll('body *')) {
    if (e.closest('svg') || !seen(e) || !words(e)) continue;
    const box = e.getBoundingClientRect();
    if (!scrolls(e) && (box.right > window.innerWidth + 1 || box.left < -1)) wrong.push(`beyond the window: ${words(e)}`);
    if (getComputedStyle(e).overflowX === 'hidden' && e.scrollWidth > e.clientWidth + 1) wrong.push(`cut off: ${words(e)}`);
  }
  for (const svg of document.querySelectorAll('figure svg')) {
    if (!seen(svg)) continue;
    const frame = svg.getBoundingClientRect(), texts = [...svg.querySelectorAll('text')];
    const boxes = texts.map(t => t.getBoundingClientRect());
    texts.forEach((t, i) => {
      const a = boxes[i];
      if (a.left < frame.left - 1 || a.right > frame.right + 1 || a.top < frame.top - 1 || a.bottom > frame.bottom + 1)
        wrong.push(`outside of its picture: ${words(t)}`);
      if (parseFloat(getComputedStyle(t).fontSize) * frame.width / svg.viewBox.baseVal.width < 8.5)
        wrong.push(`too small to read: ${words(t)}`);
      for (let j = i + 1; j < texts.length; j++) {
        const b = boxes[j], w = Math.min(a.right, b.right) - Math.max(a.left, b.left);
        const h = Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top);
        if (w > 1 && h > 4) wrong.push(`${words(t)} lies over ${words(texts[j])}`);
      }
    });
  }
  const light = c => { const [r, g, b] = c.match(/[\d.]+/g).slice(0, 3).map(v => v / 255)
    .map(v => v <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4); return .2126 * r + .7152 * g + .0722 * b; };
  const under = e => { for (let p = e; p; p = p.parentElement) { const c = getComputedStyle(p).backgroundColor;
    if (c !== 'rgba(0, 0, 0, 0)' && c !== 'transparent') return c; } return 'rgb(255, 255, 255)'; };
  for (const e of document.querySelectorAll('body *')) {
    if (e.closest('svg') || !seen(e) || ![...e.childNodes].some(n => n.nodeType === 3 && n.textContent.trim())) continue;
    const a = light(getComputedStyle(e).color), b = light(under(e));
    const contrast = (Math.max(a, b) + .05) / (Math.min(a, b) + .05);
    if (contrast < 4.5) wrong.push(`contrast ${contrast.toFixed(1)}: ${words(e)}`);
  }
  const cells = [...document.querySelectorAll('svg.heat')].filter(seen).flatMap(s => [...s.querySelectorAll('text')]);
  for (const t of cells) {
    const role = t.getAttribute('class').match(/^on-(h\d)$/);
    if (!role) continue;
    const a = light(getComputedStyle(t).fill), b = light(getComputedStyle(t.closest('svg').querySelector('.' + role[1])).fill);
    const contrast = (Math.max(a, b) + .05) / (Math.min(a, b) + .05);
    if (contrast < 4.5) wrong.push(`contrast ${contrast.toFixed(1)} on ${role[1]}`);
  }
  for (const entry of performance.getEntriesByType('resource')) wrong.push(`loads ${entry.name}`);
  return JSON.stringify([...new Set(wrong)]);
})()
