// Of every text that is seen: [contrast to what lies behind it (WCAG 2.1), the text, its element].
() => {
  const paint = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
  const colour = (css) => { paint.clearRect(0, 0, 1, 1); paint.fillStyle = css; paint.fillRect(0, 0, 1, 1);
    const [r, g, b, a] = paint.getImageData(0, 0, 1, 1).data; return [r, g, b, a / 255]; };
  const over = (top, under) => top.slice(0, 3).map((v, i) => v * top[3] + under[i] * (1 - top[3]));
  const light = (rgb) => { const [r, g, b] = rgb.map((v) => { v /= 255; return v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4; });
    return 0.2126 * r + 0.7152 * g + 0.0722 * b; };
  const back = (element) => { const layers = [];
    for (let e = element; e; e = e.parentElement) layers.unshift(colour(getComputedStyle(e).backgroundColor));
    return layers.reduce((under, top) => over(top, under), [255, 255, 255]); };
  const found = [];
  for (const e of document.querySelectorAll("body *")) {
    const own = [...e.childNodes].filter((n) => n.nodeType === 3).map((n) => n.textContent.trim()).join("") || (e.matches("input:not([type=range]):not([type=file]):not([type=color]), textarea") ? e.value : "");
    if (!own || !e.checkVisibility({ opacityProperty: true, visibilityProperty: true }) || e.matches(".tag, script, style")) continue;
    const box = e.getBoundingClientRect(); if (!box.width || !box.height) continue;
    const under = back(e), text = over(colour(getComputedStyle(e).color), under);
    const [a, b] = [light(text), light(under)].sort((x, y) => y - x);
    found.push([Math.round(100 * (a + 0.05) / (b + 0.05)) / 100, own.slice(0, 40), e.tagName]);
  }
  return found;
}
